"""Tags of a catalog in the formats that shops, publishers and search engines read: one module a format."""
