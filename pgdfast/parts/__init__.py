"""Problems in parts: rows that come in batches, or that several processes share."""
