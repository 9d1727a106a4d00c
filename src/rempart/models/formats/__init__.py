"""One file per form that a model can come in: each has a `load_*` function from its place to a `Classifier`."""

FORMS = (
    "a directory that `rempart train` wrote, a Hugging Face folder, a .keras or .h5 file of Keras, an .onnx file, "
    "a .pt2 file of torch.export, timm:NAME@FILE, torchvision:NAME@FILE, or python:package.module:factory"
)
PYTHON = "python:"
RECIPE = (
    "write a function that builds the network and fills it from a safetensors file, and give python:module:function"
)
