"""One call: its description, its operators for autograd and the compiler, and the same in plain PyTorch."""
