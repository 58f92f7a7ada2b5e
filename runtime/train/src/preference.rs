//! Losses on preferences: how much better the policy finds the chosen answer than the rejected one.
//!
//! All of them need of the model only the log-probability of each answer, summed over its tokens; the reference is the
//! same model with the adapter switched off. So a step is: score the answers, call this for the losses and their
//! derivatives by those scores, and go backwards with them as weights of the answers' cross-entropies
//! (∂loss/∂θ = Σ ∂loss/∂score · ∂score/∂θ).
//!
//! | loss | paper |
//! | --- | --- |
//! | DPO, with label smoothing cDPO | Rafailov and others 2023, arXiv:2305.18290; Mitchell 2023 |
//! | robust DPO | Chowdhury and others 2024, arXiv:2403.00409 |
//! | hinge | Zhao and others 2023 (SLiC), arXiv:2305.10425 |
//! | IPO | Azar and others 2023, arXiv:2310.12036 |
//! | ORPO | Hong and others 2024, arXiv:2403.07691 |
//! | SimPO | Meng and others 2024, arXiv:2405.14734 |
//! | KTO | Ethayarajh and others 2024, arXiv:2402.01306 |
//!
//! Where the papers leave details open they are those of TRL. Numbers are `f64`: there are few, and differences of sums
//! over long answers cancel.

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::config::check;

/// What a training run minimises.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// The cross-entropy of the trained tokens.
    #[default]
    CrossEntropy,
    /// −log σ(β d). With `smoothing` ε (cDPO): −(1−ε) log σ(β d) − ε log σ(−β d).
    Dpo {
        /// How far the policy may go from the reference: the smaller the further.
        #[serde(default = "beta")]
        beta: f64,
        /// Share of pairs that are believed to be the wrong way round.
        #[serde(default)]
        smoothing: f64,
    },
    /// (−(1−ε) log σ(β d) + ε log σ(−β d)) / (1 − 2ε): unbiased where a share ε of pairs is the wrong way round.
    Robust {
        /// As for DPO.
        #[serde(default = "beta")]
        beta: f64,
        /// ε, below one half.
        #[serde(default = "smoothing")]
        smoothing: f64,
    },
    /// max(0, 1 − β d).
    Hinge {
        /// As for DPO.
        #[serde(default = "beta")]
        beta: f64,
    },
    /// (d − 1 / 2β)², with averages over tokens in place of sums in d.
    Ipo {
        /// As for DPO.
        #[serde(default = "beta")]
        beta: f64,
    },
    /// The chosen answer's cross-entropy per token − β log σ(log odds ratio), without a reference.
    Orpo {
        /// Weight of the second term (λ in the paper).
        #[serde(default = "beta")]
        beta: f64,
    },
    /// −log σ(β (a_w − a_l) − γ) of the averages over tokens, without a reference.
    Simpo {
        /// Scale of the averages.
        #[serde(default = "simpo_beta")]
        beta: f64,
        /// γ, the margin that is wanted.
        #[serde(default = "gamma")]
        gamma: f64,
    },
    /// Answers that are good or bad by themselves, not in pairs; see [`kto`].
    Kto {
        /// As for DPO.
        #[serde(default = "beta")]
        beta: f64,
        /// Weight of the good ones.
        #[serde(default = "one")]
        good: f64,
        /// Weight of the bad ones.
        #[serde(default = "one")]
        bad: f64,
    },
}

fn beta() -> f64 {
    0.1
}
fn smoothing() -> f64 {
    0.1
}
fn simpo_beta() -> f64 {
    2.0
}
fn gamma() -> f64 {
    0.5
}
fn one() -> f64 {
    1.0
}

/// The scores of a pair: log-probabilities, summed over the tokens of each answer, and the numbers of those tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PairScores {
    /// Of the chosen answer, by the model in training.
    pub policy_chosen: f64,
    /// Of the rejected answer, by the model in training.
    pub policy_rejected: f64,
    /// Of the chosen answer, by the reference. Not used where [`Loss::needs_reference`] is false.
    pub reference_chosen: f64,
    /// Of the rejected answer, by the reference.
    pub reference_rejected: f64,
    /// Tokens of the chosen answer.
    pub tokens_chosen: usize,
    /// Tokens of the rejected answer.
    pub tokens_rejected: usize,
}

/// The loss of a pair, and its derivatives.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PairLoss {
    /// The loss.
    pub loss: f64,
    /// ∂loss / ∂`policy_chosen`.
    pub d_chosen: f64,
    /// ∂loss / ∂`policy_rejected`.
    pub d_rejected: f64,
    /// What the policy is paid for the chosen answer: β times its gain over the reference. Without a reference, β times
    /// the average log-probability.
    pub reward_chosen: f64,
    /// The same of the rejected answer.
    pub reward_rejected: f64,
}

impl PairLoss {
    /// Whether the chosen answer is preferred.
    pub fn correct(&self) -> bool {
        self.reward_chosen > self.reward_rejected
    }
}

impl Loss {
    /// DPO with its defaults.
    pub fn dpo() -> Loss {
        Loss::Dpo { beta: beta(), smoothing: 0.0 }
    }

    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) with the parameter and its range.
    pub fn validate(&self) -> Result<()> {
        let positive = |field: &str, value: f64| {
            check(&format!("loss: {field}"), value, value > 0.0 && value.is_finite(), "above 0")
        };
        let share = |value: f64| check("loss: smoothing", value, (0.0..0.5).contains(&value), "from 0 to below 0.5");
        match *self {
            Loss::CrossEntropy => Ok(()),
            Loss::Dpo { beta, smoothing } | Loss::Robust { beta, smoothing } => {
                positive("beta", beta).and_then(|()| share(smoothing))
            }
            Loss::Hinge { beta } | Loss::Ipo { beta } | Loss::Orpo { beta } => positive("beta", beta),
            Loss::Simpo { beta, gamma } => {
                positive("beta", beta)?;
                check("loss: gamma", gamma, gamma >= 0.0 && gamma.is_finite(), "0 or above")
            }
            Loss::Kto { beta, good, bad } => {
                positive("beta", beta)?;
                positive("good", good)?;
                positive("bad", bad)
            }
        }
    }

    /// Whether the scores of the model without its adapter are needed.
    pub fn needs_reference(&self) -> bool {
        !matches!(self, Loss::CrossEntropy | Loss::Orpo { .. } | Loss::Simpo { .. })
    }

    /// The loss of one pair; `None` for the losses that are not of pairs (cross-entropy, KTO). Tokens are counted as at
    /// least 1.
    pub fn pair(&self, scores: &PairScores) -> Option<PairLoss> {
        let (tokens_chosen, tokens_rejected) =
            (scores.tokens_chosen.max(1) as f64, scores.tokens_rejected.max(1) as f64);
        let gain_chosen = scores.policy_chosen - scores.reference_chosen;
        let gain_rejected = scores.policy_rejected - scores.reference_rejected;
        let (mean_chosen, mean_rejected) =
            (scores.policy_chosen / tokens_chosen, scores.policy_rejected / tokens_rejected);
        // A loss of the difference of two gains: the derivatives differ in sign only.
        let of_gains = |beta: f64, loss: f64, slope: f64| PairLoss {
            loss,
            d_chosen: slope * beta,
            d_rejected: -slope * beta,
            reward_chosen: beta * gain_chosen,
            reward_rejected: beta * gain_rejected,
        };
        Some(match *self {
            Loss::CrossEntropy | Loss::Kto { .. } => return None,
            Loss::Dpo { beta, smoothing } => {
                let x = beta * (gain_chosen - gain_rejected);
                let loss = (1.0 - smoothing) * softplus(-x) + smoothing * softplus(x);
                of_gains(beta, loss, smoothing * sigmoid(x) - (1.0 - smoothing) * sigmoid(-x))
            }
            Loss::Robust { beta, smoothing } => {
                let x = beta * (gain_chosen - gain_rejected);
                let loss = ((1.0 - smoothing) * softplus(-x) - smoothing * softplus(x)) / (1.0 - 2.0 * smoothing);
                let slope = -((1.0 - smoothing) * sigmoid(-x) + smoothing * sigmoid(x)) / (1.0 - 2.0 * smoothing);
                of_gains(beta, loss, slope)
            }
            Loss::Hinge { beta } => {
                let x = beta * (gain_chosen - gain_rejected);
                of_gains(beta, (1.0 - x).max(0.0), if x < 1.0 { -1.0 } else { 0.0 })
            }
            Loss::Ipo { beta } => {
                let off = gain_chosen / tokens_chosen - gain_rejected / tokens_rejected - 0.5 / beta;
                PairLoss {
                    loss: off * off,
                    d_chosen: 2.0 * off / tokens_chosen,
                    d_rejected: -2.0 * off / tokens_rejected,
                    reward_chosen: beta * gain_chosen,
                    reward_rejected: beta * gain_rejected,
                }
            }
            Loss::Orpo { beta } => {
                let odds = mean_chosen - mean_rejected - (log1m_exp(mean_chosen) - log1m_exp(mean_rejected));
                // d/da (a − log(1 − eᵃ)) = 1 / (1 − eᵃ).
                let slope = |mean: f64| -1.0 / below_zero(mean).exp_m1();
                let outer = -beta * sigmoid(-odds);
                PairLoss {
                    loss: beta * softplus(-odds) - mean_chosen,
                    d_chosen: (outer * slope(mean_chosen) - 1.0) / tokens_chosen,
                    d_rejected: -outer * slope(mean_rejected) / tokens_rejected,
                    reward_chosen: beta * mean_chosen,
                    reward_rejected: beta * mean_rejected,
                }
            }
            Loss::Simpo { beta, gamma } => {
                let x = beta * (mean_chosen - mean_rejected) - gamma;
                let slope = -beta * sigmoid(-x);
                PairLoss {
                    loss: softplus(-x),
                    d_chosen: slope / tokens_chosen,
                    d_rejected: -slope / tokens_rejected,
                    reward_chosen: beta * mean_chosen,
                    reward_rejected: beta * mean_rejected,
                }
            }
        })
    }
}

/// An answer that was judged good or bad: its summed log-probability by policy and reference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RatedScores {
    /// By the model in training.
    pub policy: f64,
    /// By the model without its adapter.
    pub reference: f64,
    /// Whether it is good.
    pub good: bool,
}

/// The loss of a rated answer, and its derivative.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RatedLoss {
    /// The loss.
    pub loss: f64,
    /// ∂loss / ∂`policy`.
    pub d_policy: f64,
    /// β times the gain over the reference.
    pub reward: f64,
}

/// The distance of policy and reference that KTO measures gains against: max(0, mean of policy − reference) over answers
/// put to prompts they do not belong to (each prompt of a batch with the answer of the one before it). No gradient goes
/// through it. Pairs are (policy, reference); none at all gives 0.
pub fn kto_distance(mismatched: &[(f64, f64)]) -> f64 {
    let sum: f64 = mismatched.iter().map(|(policy, reference)| policy - reference).sum();
    (sum / mismatched.len().max(1) as f64).max(0.0)
}

/// KTO of one answer: 1 − σ(β (gain − distance)) if it is good, 1 − σ(β (distance − gain)) if it is bad, times the weight
/// of its kind. Keep weight · number of the good within 1 to 4/3 of that of the bad.
pub fn kto(scores: &RatedScores, distance: f64, beta: f64, weight: f64) -> RatedLoss {
    let gain = scores.policy - scores.reference;
    let sign = if scores.good { 1.0 } else { -1.0 };
    let x = sign * beta * (gain - distance);
    RatedLoss {
        loss: weight * sigmoid(-x),
        d_policy: -weight * sign * beta * sigmoid(x) * sigmoid(-x),
        reward: beta * gain,
    }
}

/// log(1 + eˣ), for any x.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// 1 / (1 + e⁻ˣ), for any x.
fn sigmoid(x: f64) -> f64 {
    let e = (-x.abs()).exp();
    if x >= 0.0 { 1.0 / (1.0 + e) } else { e / (1.0 + e) }
}

/// A log-probability is at most 0; a hair below it the odds are still finite.
fn below_zero(a: f64) -> f64 {
    a.min(-1e-12)
}

/// log(1 − eᵃ) for a < 0, split at −ln 2 (Mächler 2012).
fn log1m_exp(a: f64) -> f64 {
    let a = below_zero(a);
    if a > -std::f64::consts::LN_2 { (-a.exp_m1()).ln() } else { (-a.exp()).ln_1p() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden() -> serde_json::Value {
        serde_json::from_str(include_str!("../tests/golden/preference.json")).unwrap()
    }

    fn numbers(value: &serde_json::Value) -> Vec<f64> {
        value.as_array().expect("a list").iter().map(|v| v.as_f64().unwrap()).collect()
    }

    fn pairs() -> Vec<PairScores> {
        let golden = golden();
        let column = |key: &str| numbers(&golden[key]);
        let (pc, pr, rc, rr) =
            (column("policy_chosen"), column("policy_rejected"), column("ref_chosen"), column("ref_rejected"));
        let (nc, nr) = (column("len_chosen"), column("len_rejected"));
        (0..pc.len())
            .map(|i| PairScores {
                policy_chosen: pc[i],
                policy_rejected: pr[i],
                reference_chosen: rc[i],
                reference_rejected: rr[i],
                tokens_chosen: nc[i] as usize,
                tokens_rejected: nr[i] as usize,
            })
            .collect()
    }

    fn near(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-12 * a.abs().max(b.abs()).max(1e-3)
    }

    #[test]
    fn meets_the_reference_values() {
        let golden = golden();
        let mut compared = 0;
        let mut compare = |loss: Loss, key: &str, value: fn(&PairLoss) -> f64| {
            for (scores, wanted) in pairs().iter().zip(numbers(&golden[key])) {
                let got = value(&loss.pair(scores).unwrap());
                assert!(near(got, wanted), "{key}: {got} instead of {wanted}");
                compared += 1;
            }
        };
        for beta in [0.1, 0.3] {
            compare(Loss::Dpo { beta, smoothing: 0.0 }, &format!("dpo_sigmoid_b{beta}"), |l| l.loss);
            compare(Loss::Dpo { beta, smoothing: 0.1 }, &format!("cdpo_eps0.1_b{beta}"), |l| l.loss);
            compare(Loss::Dpo { beta, smoothing: 0.0 }, &format!("reward_chosen_b{beta}"), |l| l.reward_chosen);
            compare(Loss::Dpo { beta, smoothing: 0.0 }, &format!("reward_rejected_b{beta}"), |l| l.reward_rejected);
            compare(Loss::Robust { beta, smoothing: 0.1 }, &format!("dpo_robust_eps0.1_b{beta}"), |l| l.loss);
            compare(Loss::Hinge { beta }, &format!("dpo_hinge_b{beta}"), |l| l.loss);
            compare(Loss::Ipo { beta }, &format!("dpo_ipo_b{beta}"), |l| l.loss);
        }
        compare(Loss::Simpo { beta: 2.0, gamma: 0.5 }, "simpo_b2.0_g0.5", |l| l.loss);
        compare(Loss::Simpo { beta: 2.5, gamma: 1.4 }, "simpo_b2.5_g1.4", |l| l.loss);
        for beta in [0.1, 0.3] {
            let part = &golden[format!("orpo_b{beta}").as_str()];
            let (terms, means) = (numbers(&part["or_term"]), numbers(&part["avg_logp_chosen"]));
            for ((scores, term), mean) in pairs().iter().zip(terms).zip(means) {
                let got = Loss::Orpo { beta }.pair(scores).unwrap();
                // The reference gives the second term alone: β log σ(o).
                assert!(near(got.loss, -mean - term), "orpo: {} instead of {}", got.loss, -mean - term);
                compared += 1;
            }
        }
        assert_eq!(compared, 72);
    }

    #[test]
    fn kto_meets_the_reference_values() {
        let golden = golden();
        let pairs = pairs();
        for beta in [0.1, 0.3] {
            let part = &golden[format!("kto_b{beta}").as_str()];
            let distance = part["kl"].as_f64().unwrap();
            let (chosen, rejected) = (numbers(&part["chosen"]), numbers(&part["rejected"]));
            for (i, p) in pairs.iter().enumerate() {
                let good = RatedScores { policy: p.policy_chosen, reference: p.reference_chosen, good: true };
                let bad = RatedScores { policy: p.policy_rejected, reference: p.reference_rejected, good: false };
                assert!(near(kto(&good, distance, beta, 1.0).loss, chosen[i]));
                assert!(near(kto(&bad, distance, beta, 1.0).loss, rejected[i]));
                assert!(near(kto(&bad, distance, beta, 1.5).loss, 1.5 * rejected[i]));
            }
        }
        assert_eq!(kto_distance(&[]), 0.0);
        assert_eq!(kto_distance(&[(-1.0, -3.0), (-2.0, -1.0)]), 0.5);
        assert_eq!(kto_distance(&[(-3.0, -1.0)]), 0.0);
    }

    const LOSSES: [Loss; 7] = [
        Loss::Dpo { beta: 0.1, smoothing: 0.0 },
        Loss::Dpo { beta: 0.3, smoothing: 0.2 },
        Loss::Robust { beta: 0.2, smoothing: 0.1 },
        Loss::Hinge { beta: 0.1 },
        Loss::Ipo { beta: 0.1 },
        Loss::Orpo { beta: 0.5 },
        Loss::Simpo { beta: 2.0, gamma: 0.5 },
    ];

    #[test]
    fn derivatives_are_those_of_the_loss() {
        let step = 1e-4;
        for (loss, scores) in LOSSES.iter().flat_map(|loss| pairs().into_iter().map(move |scores| (loss, scores))) {
            let at = |chosen: f64, rejected: f64| {
                let moved = PairScores {
                    policy_chosen: scores.policy_chosen + chosen,
                    policy_rejected: scores.policy_rejected + rejected,
                    ..scores
                };
                loss.pair(&moved).unwrap().loss
            };
            let got = loss.pair(&scores).unwrap();
            let chosen = (at(step, 0.0) - at(-step, 0.0)) / (2.0 * step);
            let rejected = (at(0.0, step) - at(0.0, -step)) / (2.0 * step);
            assert!((got.d_chosen - chosen).abs() < 1e-7 * (1.0 + chosen.abs()), "{loss:?} {got:?} {chosen}");
            assert!((got.d_rejected - rejected).abs() < 1e-7 * (1.0 + rejected.abs()), "{loss:?} {got:?} {rejected}");
        }
        for good in [true, false] {
            let at = |policy: f64| kto(&RatedScores { policy, reference: -20.0, good }, 0.4, 0.2, 1.3);
            let slope = (at(-18.0 + step).loss - at(-18.0 - step).loss) / (2.0 * step);
            assert!((at(-18.0).d_policy - slope).abs() < 1e-9);
        }
    }

    #[test]
    fn stays_finite_far_out() {
        for loss in LOSSES {
            for (chosen, rejected) in [(0.0, -1e5), (-1e5, 0.0), (0.0, 0.0), (-1e5, -1e5)] {
                let scores = PairScores {
                    policy_chosen: chosen,
                    policy_rejected: rejected,
                    reference_chosen: -10.0,
                    reference_rejected: -10.0,
                    tokens_chosen: 3,
                    tokens_rejected: 0,
                };
                let got = loss.pair(&scores).unwrap();
                assert!(
                    got.loss.is_finite() && got.d_chosen.is_finite() && got.d_rejected.is_finite(),
                    "{loss:?} {got:?}"
                );
            }
        }
        assert!(Loss::CrossEntropy.pair(&PairScores::default()).is_none());
    }

    /// Gradient descent on the scores themselves must come to prefer the chosen answers.
    #[test]
    fn descent_prefers_the_chosen() {
        for loss in LOSSES {
            let mut pairs = pairs();
            for _ in 0..20 {
                for scores in &mut pairs {
                    let got = loss.pair(scores).unwrap();
                    scores.policy_chosen = (scores.policy_chosen - 20.0 * got.d_chosen).min(-1e-3);
                    scores.policy_rejected -= 20.0 * got.d_rejected;
                }
            }
            assert!(pairs.iter().filter(|scores| loss.pair(scores).unwrap().correct()).count() > 2, "{loss:?}");
        }
    }
}
