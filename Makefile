# Two commands, each complete on a fresh machine:  make demo  and  make test
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
SEED ?= 1100000
PROMPT ?= a photo of a smiling person in a red shirt in a garden

.PHONY: demo app test fuzz format clean
.DEFAULT_GOAL := demo

$(INSTALLED): pyproject.toml setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	@echo "Installing into .venv (a few minutes the first time) ..."
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	@touch $@

# A portrait of somebody whom the model has never seen, then four new pictures of the same person.
demo: $(INSTALLED)
	@rm -rf demo
	$(BIN)/face-fusion avatars --out demo --portrait $(SEED)
	$(BIN)/face-fusion generate --face demo/reference.png --prompt "$(PROMPT)" --num-images 4 --seed 0 --out demo
	@echo "Look at demo/contact_sheet.png: reference | without Face Fusion | with Face Fusion"

# The web page, on this machine only: open the address that it prints.
app: $(INSTALLED)
	$(BIN)/face-fusion app

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --dist loadfile --max-worker-restart 1

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv demo build dist *.egg-info

# Ten thousand damaged files, values and command lines of each kind (an hour on two cores).
fuzz: $(INSTALLED)
	FACE_FUSION_FUZZ=10000 $(BIN)/python -m pytest tests/fuzz -n auto -q
