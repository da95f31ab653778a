"""`flowalign rewards`: list the rewards, and check that one keeps the contract."""

from pathlib import Path
from typing import Annotated

import typer

from flowalign.cli.console import ImagePrompts, RewardOptions, console, quiet_libraries, show_findings
from flowalign.config.base import UserError
from flowalign.terminal import table_of

rewards_app = typer.Typer(help="List the rewards, and check that one keeps the contract.", invoke_without_command=True)


@rewards_app.callback()
def list_rewards(context: typer.Context) -> None:
    """List the rewards that a recipe can name, built in and installed."""
    if context.invoked_subcommand is None:
        from rewards.catalogue import available, describe

        console.print(table_of(("reward", "what it judges"), ((name, describe(name)) for name in available())))


@rewards_app.command("check")
def check_reward(
    reward: Annotated[str, typer.Argument(help="a built-in name, file.py:Name, package.module:Name or http://...")],
    images: Annotated[
        Path | None, typer.Option(help="a folder of images to score; default: a few images that the command draws")
    ] = None,
    prompts: ImagePrompts = None,
    option: RewardOptions = None,
) -> None:
    """Check a reward: order, batch size, determinism, range, prompts, known scores. Exit code 1 if a check fails."""
    from flowalign.cli.existing import check_images, check_prompts, check_rewards

    check_rewards([reward])
    check_images(images)
    check_prompts(prompts)
    quiet_libraries()
    from flowalign.cli.scoring import check_reward as findings_of

    if images is None and prompts is not None:
        raise UserError("--prompts belong to --images; give --images too")
    show_findings(reward, findings_of(reward, option or [], images, prompts))
