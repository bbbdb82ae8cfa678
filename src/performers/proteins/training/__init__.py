"""Training of protein language models, exactly resumable."""
