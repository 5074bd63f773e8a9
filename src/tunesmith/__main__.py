"""`python -m tunesmith`, for launchers that start modules: `torchrun --nproc_per_node 2 -m tunesmith train ...`."""

from tunesmith.cli.main import main

main()
