"""locas."""
