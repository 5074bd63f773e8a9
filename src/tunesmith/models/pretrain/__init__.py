"""How the embedded models were made: `python -m tunesmith.models.pretrain NAME`."""
