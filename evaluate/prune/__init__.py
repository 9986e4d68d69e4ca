"""A new SAE without the redundant features of another one."""
