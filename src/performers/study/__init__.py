"""Studies: whole comparisons of attentions, from data to tables, figures and a page."""
