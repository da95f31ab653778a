"""`flowalign serve`: serve rewards over HTTP."""

from typing import Annotated

import typer

from flowalign.cli.console import RewardOptions, device, quiet_libraries
from flowalign.config.base import UserError


def serve(
    rewards: Annotated[
        list[str],
        typer.Argument(metavar="REWARD...", help="rewards: built-in names, file.py:Name or package.module:Name"),
    ],
    host: Annotated[
        str, typer.Option(help="the address to listen on; any but loopback needs a token in FLOWALIGN_TOKEN")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="the port to listen on")] = 8000,
    option: RewardOptions = None,
) -> None:
    """Serve rewards over HTTP, for recipes that name them as http://HOST:PORT/REWARD."""
    from flowalign.cli.existing import check_rewards

    check_rewards(rewards)
    quiet_libraries()
    import rewards as zoo
    from flowalign.config.options import parse_options
    from rewards.http.server import serve as run_server

    options = parse_options(rewards, option or [])
    served = [name.rpartition(":")[2] for name in rewards]
    for name in served:
        if served.count(name) > 1:
            raise UserError(f"two rewards would be served as {name!r}; serve one of them on another port")
    loaded = {short: zoo.load_on(device(), name, **options[name]) for short, name in zip(served, rewards, strict=True)}
    run_server(loaded, host=host, port=port)
