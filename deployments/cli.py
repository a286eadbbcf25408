"""`tatara`: the few commands that stand around Prefect's own.

    tatara demo                     set up, run finetune/tiny, show what was made
    tatara up | down                Prefect server, deployments and worker; stop them, trainers and the services
    tatara services ACTION          start | stop | restart | status of vLLM and the gateway
    tatara blocks                   register the block types with the Prefect server
    tatara recipe NAME              print a resolved recipe as JSON
    tatara fit RECIPE               whether its training fits this machine, or one of --gpu-gb
    tatara watch [RUN]              a run that learns, live: in the terminal, or as a page (--page PORT, --html FILE)
    tatara traces ACTION            tail | stats | export | dead: look into the trace queue
    tatara provenance ID            from an answer to its data rows, from a row to the models it went into
    tatara generate --prompt TEXT   what a model says, token by token: from its files, or from an endpoint

Ring: edge. Exit status: 0 done, 1 an error of ours (one line on stderr), 2 wrong usage.
"""

import argparse
import json
import logging
import os
import signal
import sys
from typing import Any

from tasks.errors import TataraError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit status."""
    parser = argparse.ArgumentParser(prog="tatara", description="From a data set to a served, proven model.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("demo", help="run the main job on this machine")
    commands.add_parser("up", help="start Prefect's server, deployments and worker")
    commands.add_parser("down", help="stop worker, trainers, server, gateway and vLLM")
    services = commands.add_parser("services", help="vLLM and the gateway")
    services.add_argument("action", choices=("start", "stop", "restart", "status"))
    commands.add_parser("blocks", help="register the block types")
    recipe = commands.add_parser("recipe", help="print a resolved recipe")
    recipe.add_argument("name")
    _add_fit(commands, arguments)
    _add_watch(commands, arguments)
    _add_traces(commands, arguments)
    _add_provenance(commands, arguments)
    _add_generate(commands, arguments)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        status = _COMMANDS[options.command](options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `tatara ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it ends
        return 128 + signal.SIGPIPE
    except TataraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except PermissionError as error:  # after `sudo tatara ...`, say
        print(
            f"error: {error}: do it as the user whose it is, or set TATARA_HOME to a folder of yours", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted; what is whole is kept, the same command goes on from there", file=sys.stderr)
        return 130


def _demo(options: argparse.Namespace) -> int:
    from deployments import demo, orchestration

    return demo.run_demo(orchestration.find_prefect(os.environ))


def _up(options: argparse.Namespace) -> int:
    from deployments import orchestration
    from deployments.lost_runs import settle_lost_runs

    prefect = orchestration.find_prefect(os.environ)
    orchestration.start_server(prefect)
    fresh = orchestration.deploy(prefect)
    settle_lost_runs(prefect, "local")
    worker = orchestration.start_worker(prefect)
    print(f"{'deployed' if fresh else 'deployed before'}, worker {worker}")
    print(f"{prefect.ui_url}\nexport PREFECT_API_URL={prefect.api_url}")
    return 0


def _down(options: argparse.Namespace) -> int:
    from deployments import orchestration
    from deployments.services import main as services
    from tasks.supervision import stop_unwatched

    prefect = orchestration.find_prefect(os.environ)
    stopped = orchestration.stop(prefect)
    stopped += [f"trainer of {name}" for name in stop_unwatched(prefect.home.parent)]  # they outlive their flow
    print(f"stopped {' and '.join(stopped)}" if stopped else "no Prefect of ours was running")
    return services(["stop"])


def _services(options: argparse.Namespace) -> int:
    from deployments.services import main as services

    return services([options.action])


def _blocks(options: argparse.Namespace) -> int:
    from deployments import orchestration

    os.environ.update(orchestration.find_prefect(os.environ).variables)  # before Prefect reads its settings
    from blocks.register import register

    print("\n".join(register()))
    return 0


def _recipe(options: argparse.Namespace) -> int:
    from flows.recipes import REINFORCE_RECIPES, resolve, resolve_reinforce

    found = resolve_reinforce(options.name) if options.name in REINFORCE_RECIPES else resolve(options.name)
    print(json.dumps(found.model_dump(mode="json"), indent=2, ensure_ascii=False))
    return 0


def _add_fit(commands: Any, arguments: list[str] | None) -> None:  # Any: argparse's own private class
    """Add `fit`; its words are loaded only when they are asked for, as those below."""
    parser = commands.add_parser("fit", help="whether a recipe's training fits a machine")
    if "fit" in (sys.argv[1:2] if arguments is None else arguments[:1]):
        from deployments.fit import add_arguments

        add_arguments(parser)


def _fit(options: argparse.Namespace) -> int:
    from deployments.fit import run

    return run(options)


def _add_watch(commands: Any, arguments: list[str] | None) -> None:  # Any: argparse's own private class
    parser = commands.add_parser("watch", help="a run that learns, live")
    if "watch" in (sys.argv[1:2] if arguments is None else arguments[:1]):
        from deployments.watch import add_arguments

        add_arguments(parser)


def _watch(options: argparse.Namespace) -> int:
    from deployments.watch import run

    return run(options)


def _add_traces(commands: Any, arguments: list[str] | None) -> None:  # Any: argparse's own private class
    """Add `traces`; its actions are loaded (0.4 s) only when they are asked for."""
    parser = commands.add_parser("traces", help="look into the trace queue")
    if "traces" in (sys.argv[1:2] if arguments is None else arguments[:1]):
        from deployments.traces import add_commands

        add_commands(parser)


def _traces(options: argparse.Namespace) -> int:
    from deployments.traces import run

    return run(options)


def _add_provenance(commands: Any, arguments: list[str] | None) -> None:  # Any: as above
    parser = commands.add_parser("provenance", help="where an answer comes from, where a data row went")
    if "provenance" in (sys.argv[1:2] if arguments is None else arguments[:1]):
        from deployments.provenance.command import add_arguments

        add_arguments(parser)


def _provenance(options: argparse.Namespace) -> int:
    from deployments.provenance.command import run

    return run(options)


def _add_generate(commands: Any, arguments: list[str] | None) -> None:  # Any: as above
    parser = commands.add_parser("generate", help="what a model says, token by token")
    if "generate" in (sys.argv[1:2] if arguments is None else arguments[:1]):
        from deployments.generate.command import add_arguments

        add_arguments(parser)


def _generate(options: argparse.Namespace) -> int:
    from deployments.generate.command import run

    return run(options)


_COMMANDS = {
    "demo": _demo,
    "up": _up,
    "down": _down,
    "services": _services,
    "blocks": _blocks,
    "recipe": _recipe,
    "fit": _fit,
    "watch": _watch,
    "traces": _traces,
    "provenance": _provenance,
    "generate": _generate,
}

if __name__ == "__main__":
    sys.exit(main())
