"""The model card: every figure and setting is in it, notes below the table."""

from utils.weights.model_card import write_model_card


def test_the_model_card_has_every_figure(tmp_path):
    write_model_card(
        tmp_path, "Tuned", ["Settings: run_config.yaml."], {"steps": 7, "train_loss": "1.235"}, ["A note."]
    )
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "# Tuned" in card and "Settings: run_config.yaml." in card
    assert "| steps | 7 |" in card and "| train_loss | 1.235 |" in card
    assert card.index("train_loss") < card.index("A note.")
