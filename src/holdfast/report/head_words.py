"""Names of what the ablation compares, for a person."""

SCOPES = {
    "everywhere": "at every token, thinking drawn anew",
    "end_template": "end template only, thinking fixed",
    "answer": "answer only, thinking fixed",
}
CONDITIONS = {
    "none": "nothing",
    "top": "top of the ranking",
    "random": "random, same layers",
    "positive": "bottom of the ranking",
    "second_round": "top, and top of a second round",
}
MEASURES = {
    "attack_success": "harmful, carried out",
    "over_refusal": "harmless, refused",
    "lookalike_refusal": "sounds dangerous, refused",
    "benign_compliance": "harmless, carried out",
    "utility": "questions, right",
    "degenerate": "broken text",
}
REPAIR = {
    "others_before": "What all other heads take from the logit, before",
    "others_after": "The same with the top heads off",
    "others_change": "The difference",
    "final_plain": "Refusal logit before the answer",
    "final_edited": "The same with the top heads off",
    "late_plain": "Refusal logit over the end of the answer",
    "late_edited": "The same with the top heads off",
    "lost_again": "How much of the gain is lost along the answer",
}
PARTS = {
    "heads": "All attention heads",
    "mlps": "All MLPs",
    "biases": "Attention biases",
    "embedding": "Token embedding",
    "plateau_logit": "Logit on the plateau",
    "final_logit": "Logit at the final token",
}
LIMIT = (
    "Heads were switched off one set at a time, chosen by one ranking. That few of "
    "them do not restore refusal does not show that no few heads would."
)
PLACES = {"everywhere": "everywhere", "end_template": "end", "answer": "answer"}
OTHER = {"other_attack_success": "other harmful, carried out"}
