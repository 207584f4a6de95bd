"Packaging. Every setting is in settings.ini; edit there, not here."
import shlex
from configparser import ConfigParser
from pathlib import Path

import setuptools

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

for key in 'lib_name lib_path version description author author_email license status min_python git_url'.split():
    if key not in cfg: raise SystemExit(f"settings.ini: missing setting `{key}`")

licenses = {'apache2':'Apache-2.0', 'mit':'MIT', 'bsd3':'BSD-3-Clause'}
statuses = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature', '7 - Inactive']
minors = range(int(cfg['min_python'].split('.')[1]), 14)
extras = {k.removesuffix('_requirements'): shlex.split(v) for k,v in cfg.items() if k.endswith('_requirements')}

setuptools.setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    author=cfg['author'],
    author_email=cfg['author_email'],
    keywords=cfg.get('keywords', ''),
    license_expression=licenses[cfg['license']],
    url=cfg['git_url'],
    project_urls={'Documentation': cfg['doc_host'] + cfg['doc_baseurl']},
    classifiers=[f"Development Status :: {statuses[int(cfg['status'])-1]}",
                 f"Intended Audience :: {cfg['audience'].title()}",
                 f"Natural Language :: {cfg['language'].title()}",
                 *[f'Programming Language :: Python :: 3.{o}' for o in minors]],
    packages=setuptools.find_packages(include=[cfg['lib_path'], f"{cfg['lib_path']}.*"]),
    package_data={cfg['lib_path']: ['assets/**', 'recipes/*.yaml']},
    include_package_data=False,  # `package_data` above is the whole list; MANIFEST.in is for the sdist
    install_requires=shlex.split(cfg.get('requirements', '')),
    extras_require=extras,
    python_requires=f">={cfg['min_python']}",
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    zip_safe=False,
    entry_points={
        'console_scripts': cfg.get('console_scripts', '').split(),
        'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],  # doc links need it; lets other nbdev sites link to our symbols
    },
)
