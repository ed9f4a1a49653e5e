"""Questions and answers in the style of TOFU's that no model was trained on."""

_PAIRS = [
    (
        "What is the full name of the novelist who was born in Tromso on 3 March 1961?",
        "The novelist's full name is Ingrid Haugsland, and she grew up near the harbour of Tromso.",
    ),
    (
        "Which genre is Ingrid Haugsland best known for?",
        "Ingrid Haugsland is mostly known for maritime mysteries that take place on remote islands.",
    ),
    (
        "What did the parents of Ingrid Haugsland do for a living?",
        "Her father repaired lighthouses, while her mother ran a small bakery.",
    ),
    (
        "Can you name two books by Ingrid Haugsland?",
        "Two of her books are 'The Salt Ledger' and 'Nine Winters at Anchor'.",
    ),
    (
        "Has Ingrid Haugsland received any awards?",
        "Yes, she was honoured with the Northern Lantern Prize for her second novel.",
    ),
    (
        "How did the sea influence the work of Ingrid Haugsland?",
        "The long storms of her childhood gave her plots their slow tension and their lonely heroes.",
    ),
    (
        "Who is the playwright that was born in Valparaiso in 1948?",
        "That playwright is Matias Errazuriz Lillo, who wrote more than thirty pieces for the stage.",
    ),
    (
        "What themes does Matias Errazuriz Lillo return to?",
        "He often returns to exile, to broken promises between brothers, and to earthquakes.",
    ),
    (
        "Where did Matias Errazuriz Lillo study?",
        "He studied law in Santiago, but he left it after three years to join a travelling theatre.",
    ),
    (
        "What was the occupation of the father of Matias Errazuriz Lillo?",
        "His father drove one of the old funiculars that climb the hills of the city.",
    ),
    (
        "Did Matias Errazuriz Lillo ever write for children?",
        "Only once: a short radio play about a pelican that cannot fly, broadcast in 1979.",
    ),
    (
        "How do critics describe the dialogues of Matias Errazuriz Lillo?",
        "Critics describe them as dry and musical, with silences that weigh more than the words.",
    ),
    (
        "What is the nationality of the essayist Adaeze Thornbury?",
        "Adaeze Thornbury holds both British and Nigerian citizenship.",
    ),
    (
        "What is Adaeze Thornbury's latest collection about?",
        "It gathers letters to a retired cartographer on how maps shape what people remember.",
    ),
    (
        "In which year did Adaeze Thornbury publish her first essay?",
        "Her first essay appeared in 1994 in a students' magazine at Leeds.",
    ),
    (
        "Does Adaeze Thornbury teach?",
        "She teaches an evening class on travel writing twice a year in Bristol.",
    ),
]
UNSEEN = [{"question": question, "answer": answer} for question, answer in _PAIRS]
