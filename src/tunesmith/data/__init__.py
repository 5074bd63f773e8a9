"""What is learned from: one method per file, a function from a data set to another."""
