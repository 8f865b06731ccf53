"""What the data is: samples, tables, manifests, the layout of a catalog."""
