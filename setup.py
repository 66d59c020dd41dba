"""Package metadata comes from settings.ini, so that it is written once."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
requirements = {
    name: settings.get(key, "").split()
    for name, key in [
        ("runtime", "requirements"),
        ("train", "train_requirements"),
        ("formats", "formats_requirements"),
        ("imprint", "imprint_requirements"),
        ("mlflow", "mlflow_requirements"),
        ("lakefs", "lakefs_requirements"),
        ("jobs", "jobs_requirements"),
        ("ray", "ray_requirements"),
        ("bench", "bench_requirements"),
        ("dev", "dev_requirements"),
    ]
}

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    license="AGPL-3.0-or-later",
    author=settings["author"],
    python_requires=f">={settings['min_python']}",
    packages=find_packages(include=["pillsnap", "pillsnap.*"]),
    package_data={"pillsnap.service.page": ["files/*"]},
    install_requires=requirements["runtime"],
    extras_require={
        "train": requirements["train"],
        "formats": requirements["train"] + requirements["formats"],
        "imprint": requirements["imprint"],
        "mlflow": requirements["mlflow"],
        "lakefs": requirements["lakefs"],
        "jobs": requirements["jobs"],
        "ray": requirements["ray"],
        "bench": requirements["train"] + requirements["bench"],
        "dev": requirements["train"] + requirements["dev"],
        "all": sum((requirements[name] for name in requirements if name != "runtime"), []),
    },
    entry_points={"console_scripts": ["pillsnap=pillsnap.cli:main"]},
)
