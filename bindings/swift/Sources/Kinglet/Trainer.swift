// Training, step by step.

import CKinglet
import Dispatch

/// What a training step did. Numbers that were not measured are NaN.
public struct Report: Sendable {
    /// A step went wrong: an earlier state is in place, with half the learning rate.
    public let rolledBack: Bool
    public let step, steps: UInt64
    public let loss, learningRate, gradientNorm, tokensPerSecond: Double
    public let validationLoss, rewardAccuracy, rewardMargin: Double
    /// Why the state was rolled back.
    public let note: String?
}

/// A training run: each step is taken when its report is asked for, which suits `BGProcessingTask`. When the task is
/// cancelled, the step that is running stops and has not happened.
public final class Trainer: AsyncSequence, AsyncIteratorProtocol, @unchecked Sendable {
    public typealias Element = Report

    private let pointer: OpaquePointer
    private let queue = DispatchQueue(label: "kinglet.trainer")

    init(_ pointer: OpaquePointer) { self.pointer = pointer }
    deinit { kinglet_trainer_free(pointer) }

    public func makeAsyncIterator() -> Trainer { self }

    /// Takes a step; nil when all were taken.
    public func next() async throws -> Report? {
        try await blocking(on: queue, stop: { [self] in cancel() }) { [self] in
            var native = kinglet_train_report()
            native.struct_size = UInt32(MemoryLayout<kinglet_train_report>.size)
            guard try call({ kinglet_trainer_step(pointer, &native, $0) }) == Int32(KINGLET_OK) else { return nil }
            return Report(
                rolledBack: native.kind == Int32(KINGLET_TRAIN_ROLLED_BACK),
                step: native.step, steps: native.steps,
                loss: native.loss, learningRate: native.learning_rate,
                gradientNorm: native.gradient_norm, tokensPerSecond: native.tokens_per_second,
                validationLoss: native.validation_loss,
                rewardAccuracy: native.reward_accuracy, rewardMargin: native.reward_margin,
                note: native.note.map { String(cString: $0) }
            )
        }
    }

    /// What is ahead.
    public func info() throws -> [String: Any] { try json { kinglet_trainer_info_json(pointer, $0, $1) } }

    /// Writes a checkpoint into the output folder.
    public func save() throws { try call { kinglet_trainer_save(pointer, $0) } }

    /// The adapter as it is after the steps so far.
    public func adapter() throws -> Adapter { Adapter(try make { kinglet_trainer_adapter(pointer, $0, $1) }) }

    /// Writes what was trained and a report into the output folder.
    @discardableResult
    public func finish() throws -> [String: Any] { try json { kinglet_trainer_finish(pointer, $0, $1) } }

    /// Stops the step that is running, or else the next.
    public func cancel() { kinglet_trainer_cancel(pointer) }
}
