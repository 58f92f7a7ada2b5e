// Activations of gated feed-forward layers; the argument of tanh is limited because some drivers give NaN for 90.

fn silu(x: f32) -> f32 { return x / (1.0 + exp(-x)); }

fn silu_slope(x: f32) -> f32 {
    let s = 1.0 / (1.0 + exp(-x));
    return s * (1.0 + x * (1.0 - s));
}

const GELU = 0.7978845608028654;

fn gelu(x: f32) -> f32 {
    return 0.5 * x * (1.0 + tanh(clamp(GELU * (x + 0.044715 * x * x * x), -15.0, 15.0)));
}

fn gelu_slope(x: f32) -> f32 {
    let t = tanh(clamp(GELU * (x + 0.044715 * x * x * x), -15.0, 15.0));
    return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * GELU * (1.0 + 0.134145 * x * x);
}
