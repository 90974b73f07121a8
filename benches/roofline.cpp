// Measures what this machine can do at most with a given number of threads, and prints it as JSON:
// the FMA peak in float32 (GFLOP/s) and the read bandwidth per level of the memory hierarchy (GB/s).
//
//   c++ -std=gnu++17 -O3 -march=native -ffp-contract=fast -pthread roofline.cpp -o roofline && ./roofline 2

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif
typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
constexpr int LANES = VECTOR_BYTES / sizeof(float);

// Two FMA units with a latency of 4 or 5 cycles need 8 to 10 independent sums; 12 and two operands fit in 16
// registers.
constexpr int SUMS = 12;
// Two loads a cycle, each followed by an addition of latency 3 or 4.
constexpr int STREAMS = 8;
// Short trials find the moments in which nobody else uses the machine.
constexpr int TRIALS = 10;
constexpr double TRIAL_SECONDS = 0.02;
// Work between two looks at the clock, so that looking costs nothing.
constexpr long FMA_CHUNK = 20000;
constexpr size_t READ_CHUNK = size_t(1) << 20;

using Clock = std::chrono::steady_clock;
volatile float opaque = 0.5f;  // the compiler cannot fold what it cannot know
volatile float sink;

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

float total(const Vector* sums, int count) {
    Vector all = sums[0];
    for (int i = 1; i < count; ++i) all += sums[i];
    float sum = 0;
    for (int i = 0; i < LANES; ++i) sum += all[i];
    return sum;
}

// FLOPs per second of one thread.
double multiply_add() {
    const Vector factor = Vector{} + opaque, term = Vector{} + opaque;
    Vector sums[SUMS] = {};
    double flops = 0, elapsed;
    const auto start = Clock::now();
    do {
        for (long i = 0; i < FMA_CHUNK; ++i)
            for (int k = 0; k < SUMS; ++k) sums[k] = sums[k] * factor + term;
        flops += 2.0 * FMA_CHUNK * SUMS * LANES;
    } while ((elapsed = seconds_since(start)) < TRIAL_SECONDS);
    sink = total(sums, SUMS);
    return flops / elapsed;
}

// Bytes per second of one thread that reads its buffer over and over. The sums go on from one pass to the next,
// and float addition has an order: no pass can be left out.
double read(const std::vector<Vector>& buffer) {
    const size_t bytes = buffer.size() * sizeof(Vector);
    Vector sums[STREAMS] = {};
    double done = 0, elapsed;
    const auto start = Clock::now();
    do {
        for (size_t chunk = 0; chunk < READ_CHUNK; chunk += bytes) {
            const Vector* p = buffer.data();
            for (size_t i = 0; i < buffer.size(); i += STREAMS)
                for (int k = 0; k < STREAMS; ++k) sums[k] += p[i + k];
            done += bytes;
        }
    } while ((elapsed = seconds_since(start)) < TRIAL_SECONDS);
    sink = total(sums, STREAMS);
    return done / elapsed;
}

// The best of several trials of the sum over all threads, which start together; in units of 1e9.
double best(int threads, const std::function<double(int)>& rate) {
    double best_rate = 0;
    for (int trial = 0; trial < TRIALS; ++trial) {
        std::atomic<int> waiting{threads};
        std::vector<double> rates(threads);
        std::vector<std::thread> team;
        for (int id = 0; id < threads; ++id)
            team.emplace_back([&, id] {
                for (--waiting; waiting > 0;) std::this_thread::yield();
                rates[id] = rate(id);
            });
        double sum = 0;
        for (int id = 0; id < threads; ++id) {
            team[id].join();
            sum += rates[id];
        }
        if (sum > best_rate) best_rate = sum;
    }
    return best_rate / 1e9;
}

double read_all(int threads, size_t bytes_per_thread) {
    // Rounded to whole strides of the loop, so that it has no tail.
    const size_t stride = STREAMS * sizeof(Vector);
    const size_t vectors = bytes_per_thread / stride * STREAMS;
    const std::vector<std::vector<Vector>> buffers(threads, std::vector<Vector>(vectors));
    return best(threads, [&](int id) { return read(buffers[id]); });
}

int main(int argc, char** argv) {
    const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
    if (threads < 1) return 2;
    const double peak = best(threads, [](int) { return multiply_add(); });
    const double l1 = read_all(threads, 16 << 10), l2 = read_all(threads, 256 << 10);
    const double l3 = read_all(threads, (8 << 20) / threads), dram = read_all(threads, (256 << 20) / threads);
    std::printf("{\"gflops\": %.1f, \"gb_per_s\": {\"L1\": %.1f, \"L2\": %.1f, \"L3\": %.1f, \"DRAM\": %.1f}}\n",
                peak, l1, l2, l3, dram);
}
