"""How the reason in a client's `stop:` key begins, by who wished it."""

ANNOUNCED = "leaving: "  # the client itself
OF_NODE = "pilot node: "  # its `pilot node`, that was asked to end
DRAINED = "drained: "  # an operator
PROVISIONED = DRAINED + "pilot provision"
