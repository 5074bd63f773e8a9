"""The pieces of the main job that `tunesmith.train` puts together. Nothing here knows a part by name."""
