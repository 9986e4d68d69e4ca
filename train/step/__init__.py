"""One training step: by autograd, and by hand where a gradient was derived."""
