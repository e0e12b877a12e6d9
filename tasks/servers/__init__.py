"""What `sacpo up` starts, and the environment that commands find."""
