"""What people read: tables, progress, model cards."""
