//! Twenty prompts on which engines are compared: English, Chinese and code, from a few words to a paragraph.
//!
//! They are continued, not answered: no chat template is involved, so base models can be asked too.

/// The prompts.
pub const PROMPTS: [&str; 20] = [
    // English.
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived a clockmaker who",
    "Water boils at a lower temperature on a mountain because",
    "To change a flat tyre, first make sure the car cannot roll. Then",
    "Dear Ms. Alvarez,\n\nThank you for your letter of 14 March. We have looked into the delay of your order and",
    "The three laws of thermodynamics can be summed up as follows:\n1.",
    "In 1969, Neil Armstrong and Buzz Aldrin",
    "Q: Why is the sky blue?\nA:",
    "Ingredients: 250 g flour, 3 eggs, 1/2 litre milk, a pinch of salt.\nMethod:",
    "A river that carries sediment slows down when it reaches the sea, drops what it carries, and so builds a delta. \
     Over centuries the channel shifts from one side to the other, because",
    // Chinese.
    "中华人民共和国的首都是",
    "从前有座山，山上有座庙，庙里有个老和尚，",
    "水在标准大气压下的沸点是100摄氏度，而在高山上",
    "安全生产工作应当以人为本，坚持人民至上、生命至上，",
    "问：为什么天空是蓝色的？\n答：",
    // Code.
    "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n",
    "fn main() {\n    let numbers = vec![3, 1, 2];\n    let mut sorted = numbers.clone();\n    sorted.",
    "#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; i++) {\n        printf(",
    "SELECT customers.name, COUNT(orders.id) AS total\nFROM customers\nLEFT JOIN orders ON",
    "{\n  \"name\": \"example\",\n  \"version\": \"1.0.0\",\n  \"dependencies\": {\n    \"",
];
