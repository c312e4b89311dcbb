"""Reports for people: tables, plots, progress, model cards."""
