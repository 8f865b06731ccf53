"""Whether a runner has what it needs, for `beamsight doctor --runner X`.

flink.py      job server, master, artifacts, environment of the workers
dataflow.py   packages, account, flags, bucket, image, accelerator
images.py     what an image says of itself
workers.py    what the workers are, asked of themselves by a small job
"""
