"""What `beamsight evaluate` can measure: one module a task, each with `measure(options) -> Evaluation`."""
