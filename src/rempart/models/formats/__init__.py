"""One file per form that a model can come in: each has a `load_*` function from its place to a `Classifier`."""

FORMS = (
    "a directory that `rempart train` wrote, a .keras or .h5 file of Keras, a .pt2 file of torch.export, or "
    "python:package.module:factory"
)
PYTHON = "python:"
RECIPE = (
    "write a function that builds the network and fills it from a safetensors file, and give python:module:function"
)
