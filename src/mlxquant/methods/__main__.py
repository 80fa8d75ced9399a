"""``python -m mlxquant.methods`` is the command ``mlxquant methods``."""

from ..list_methods import command

if __name__ == "__main__":
    command(prog_name="mlxquant methods")
