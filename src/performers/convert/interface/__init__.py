"""What transformers calls in a converted model: attention, masks, caches, hooks."""
