"""From a description and the operands' layouts to kernel launches."""
