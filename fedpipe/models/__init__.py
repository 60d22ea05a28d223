"""Networks as chains of named units. A new one is a function in a file of this folder and a line here."""

REGISTRY = {
    "preresnet20": "fedpipe.models.preresnet:preresnet20",
    "mlp": "fedpipe.models.small:mlp",
    "cnn4": "fedpipe.models.mobilenet:cnn4",
    "mobilenet": "fedpipe.models.mobilenet:mobilenet",
    "resnet18": "fedpipe.models.resnet:resnet18",
    "resnet34": "fedpipe.models.resnet:resnet34",
    "vit_tiny": "fedpipe.models.vit:vit_tiny",
    "cnn": "fedpipe.models.small:cnn",
    "linear": "fedpipe.models.small:linear",
    "simple_cnn": "fedpipe.models.simple_cnn:simple_cnn",
}
