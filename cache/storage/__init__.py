"""Where files lie: a local folder or object storage, and what each promises."""
