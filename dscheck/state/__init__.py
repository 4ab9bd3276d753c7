"""The live state: modules, optimizers, tensors and plain objects, flattened by global name and put back in place."""
