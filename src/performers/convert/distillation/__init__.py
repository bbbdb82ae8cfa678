"""Training that brings a converted model back to the quality of its original."""
