"""Training runs: callbacks, the optimizer Muon with AdamW, checkpoints that are verified."""
