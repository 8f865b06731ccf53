"""Training of the models that Beamsight is built around."""
