"""What people read: the report, its page, its pictures, the model card."""
