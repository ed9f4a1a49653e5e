"""Texts on which the attacks of open-unlearning and of MUSE were run, by their own code."""

THEIR_TEXTS = {
    "forget": [
        "Ann lives on Oak Road 17.",
        "Who is it?",
        "The lamp is blue, and the door is red.",
        "7 7 7 7 7 7 7 7 7",
        "A day in winter",
    ],
    "holdout": [
        "Tea, or coffee?",
        "Bob works in Brill; he sings.",
        "zzzz zzzz zzzz",
        "It rains in May and in June.",
        "3.14159",
        "No.",
    ],
}
