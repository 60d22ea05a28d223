"""Networks as chains of named units. A new one is a function in a file of this folder and a line here."""

REGISTRY = {
    "preresnet20": "fedpipe.models.preresnet:preresnet20",
    "mlp": "fedpipe.models.small:mlp",
    "vit_tiny": "fedpipe.models.vit:vit_tiny",
    "cnn": "fedpipe.models.small:cnn",
}
