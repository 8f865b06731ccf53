"""How one thing is computed: reading, decoding, models, ops, index. Never Apache Beam."""
