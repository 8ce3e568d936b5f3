"""What `CONFIG:published` computes, beside the numbers of its publication and code."""
