"""GenEval's verdict, where the architecture names it; the rule itself lives in the reward zoo."""

from rewards.geneval import Verdict, judge, soft_score

__all__ = ["Verdict", "judge", "soft_score"]
