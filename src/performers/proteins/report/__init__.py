"""Report on models: figures and one self-contained page."""
