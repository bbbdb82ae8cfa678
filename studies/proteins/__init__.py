"""Which attention suits proteins: models with different attentions, trained alike and compared."""
