// Runs an exported model in C++: masks or classes of images, or its speed. `make runner` builds it.
//
//     cpp/runner MODEL IMAGES...                            MODEL is a .ts.pt or a .pt2 that export.py made
//     cpp/runner MODEL --out FOLDER IMAGES...               masks go to FOLDER (predictions)
//     cpp/runner MODEL --bench BATCH SIZE SECONDS THREADS   times of forward passes, as JSON
//
// Images are PNG, JPEG or PPM of any size. A mask is a palette PNG whose pixel value is the class.

#include <malloc.h>

#include <chrono>
#include <csetjmp>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <memory>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include <ATen/Parallel.h>
#include <jpeglib.h>
#include <jerror.h>
#include <png.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

namespace fs = std::filesystem;
using torch::Tensor;
using Metadata = std::unordered_map<std::string, std::string>;

std::vector<std::string> split(const std::string& text) {
    std::vector<std::string> parts;
    std::stringstream stream(text);
    for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
    return parts;
}

// ---- images: uint8 (H, W, channels), channels 1 or 3 ----

void check_pixels(int64_t height, int64_t width) {
    if (height * width > 1 << 26) throw std::runtime_error("has more than 64 million pixels");
}

Tensor read_png(const std::string& path, int channels) {
    png_image image{.version = PNG_IMAGE_VERSION};
    if (!png_image_begin_read_from_file(&image, path.c_str())) throw std::runtime_error(image.message);
    // without an alpha channel libpng would blend with a background: keep the colours and drop it, as Pillow does
    check_pixels(image.height, image.width);
    image.format = channels == 1 ? PNG_FORMAT_GA : PNG_FORMAT_RGBA;
    Tensor pixels = torch::empty({image.height, image.width, channels + 1}, torch::kUInt8);
    if (!png_image_finish_read(&image, nullptr, pixels.data_ptr(), 0, nullptr)) throw std::runtime_error(image.message);
    return pixels.slice(2, 0, channels);
}

struct JpegError : jpeg_error_mgr {
    jmp_buf back;
    char message[JMSG_LENGTH_MAX];
};

Tensor read_jpeg(FILE* file, int channels) {
    Tensor pixels;  // before setjmp, so that the jump skips no constructor
    jpeg_decompress_struct jpeg;
    JpegError error;
    jpeg.err = jpeg_std_error(&error);
    error.error_exit = [](j_common_ptr broken) {  // libjpeg would end the program
        auto* error = static_cast<JpegError*>(broken->err);
        error->format_message(broken, error->message);
        longjmp(error->back, 1);
    };
    error.emit_message = [](j_common_ptr broken, int) {  // of its warnings this one means that pixels are missing
        if (broken->err->msg_code == JWRN_JPEG_EOF) broken->err->error_exit(broken);
    };
    jpeg_create_decompress(&jpeg);
    if (setjmp(error.back)) {
        jpeg_destroy_decompress(&jpeg);
        throw std::runtime_error(error.message);
    }
    jpeg_stdio_src(&jpeg, file);
    jpeg_read_header(&jpeg, TRUE);
    check_pixels(jpeg.image_height, jpeg.image_width);
    jpeg.out_color_space = channels == 1 ? JCS_GRAYSCALE : JCS_RGB;
    jpeg_start_decompress(&jpeg);
    pixels = torch::empty({jpeg.output_height, jpeg.output_width, channels}, torch::kUInt8);
    while (jpeg.output_scanline < jpeg.output_height) {
        JSAMPROW row = pixels[jpeg.output_scanline].data_ptr<uint8_t>();
        jpeg_read_scanlines(&jpeg, &row, 1);
    }
    jpeg_finish_decompress(&jpeg);
    jpeg_destroy_decompress(&jpeg);
    return pixels;
}

Tensor read_ppm(FILE* file, int channels) {
    char kind = 0;
    int width = 0, height = 0, most = 0;
    if (std::fscanf(file, "P%c %d %d %d", &kind, &width, &height, &most) != 4 || kind != (channels == 1 ? '5' : '6') ||
        most != 255 || width < 1 || height < 1 || width > 65536 || height > 65536)
        throw std::runtime_error(channels == 1 ? "not an 8-bit binary PGM (P5)" : "not an 8-bit binary PPM (P6)");
    std::fgetc(file);  // one white-space character, then the pixels
    check_pixels(height, width);
    Tensor pixels = torch::empty({height, width, channels}, torch::kUInt8);
    if (std::fread(pixels.data_ptr(), 1, pixels.numel(), file) != size_t(pixels.numel()))
        throw std::runtime_error("the file ends too early");
    return pixels;
}

Tensor read_image(const std::string& path, int channels) {
    std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
    if (!file) throw std::runtime_error("cannot be opened");
    int first = std::fgetc(file.get());
    std::rewind(file.get());
    if (first == 0x89) return read_png(path, channels);
    if (first == 0xff) return read_jpeg(file.get(), channels);
    if (first == 'P') return read_ppm(file.get(), channels);
    throw std::runtime_error("is no PNG, JPEG or PPM image");
}

void write_mask(const Tensor& mask, const std::vector<std::string>& palette, const fs::path& path) {
    png_image image{.version = PNG_IMAGE_VERSION, .width = png_uint_32(mask.size(1)),
                    .height = png_uint_32(mask.size(0)), .format = PNG_FORMAT_RGB_COLORMAP,
                    .colormap_entries = png_uint_32(palette.size())};
    std::vector<uint8_t> colours;
    for (const auto& colour : palette)
        for (int i = 0; i < 6; i += 2) colours.push_back(std::stoi(colour.substr(i, 2), nullptr, 16));
    fs::path half = path;
    half += ".tmp";  // a reader never sees half a mask
    fs::remove(half);  // a link that someone put there would be followed
    Tensor values = mask.contiguous();
    if (!png_image_write_to_file(&image, half.c_str(), 0, values.data_ptr(), 0, colours.data()))
        throw std::runtime_error(path.string() + ": " + image.message);
    fs::rename(half, path);
}

// ---- the model: a function of uint8 images (N, C, H, W), and what export.py says of it ----

std::pair<std::function<Tensor(const Tensor&)>, Metadata> load(const std::string& path) {
    if (path.ends_with(".pt2")) {
        auto loader = std::make_shared<torch::inductor::AOTIModelPackageLoader>(path);
        return {[loader](const Tensor& images) { return loader->run({images})[0]; }, loader->get_metadata()};
    }
    Metadata about{{"classes", ""}, {"palette", ""}, {"stride", ""}, {"mean", ""}, {"data", ""}};
    auto module = std::make_shared<torch::jit::Module>(torch::jit::load(path, torch::kCPU, about));
    return {[module](const Tensor& images) { return module->forward({images}).toTensor(); }, about};
}

// KiB: "VmRSS:" what this process holds now, "VmHWM:" the most that it ever held. Not getrusage, which counts what
// the parent process held when it started this one.
long memory(const std::string& which) {
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);)
        if (line.starts_with(which)) return std::stol(line.substr(which.size()));
    return 0;
}

void bench(const std::function<Tensor(const Tensor&)>& model, int channels, char** how, long before) {
    const int batch = std::stoi(how[0]), size = std::stoi(how[1]);
    const double least = std::stod(how[2]);
    at::set_num_threads(std::stoi(how[3]));
    const Tensor images = torch::randint(256, {batch, channels, size, size}, torch::kUInt8);
    std::vector<double> seconds;
    double total = 0;
    for (int i = 0; i < 3; i++) model(images);
    while (total < least || seconds.size() < 5) {
        const auto start = std::chrono::steady_clock::now();
        model(images);
        seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
        total += seconds.back();
    }
    std::cout << "{\"peak_mb\": " << (memory("VmHWM:") - before) / 1024 << ", \"seconds\": [";
    for (size_t i = 0; i < seconds.size(); i++) std::cout << (i ? ", " : "") << seconds[i];
    std::cout << "]}\n";
}

int run(int argc, char** argv) {
    if (argc < 3)
        throw std::runtime_error("usage: runner MODEL [--out FOLDER] IMAGES... | --bench BATCH SIZE SECONDS THREADS");
    mallopt(M_MMAP_THRESHOLD, 1 << 30);  // keep large tensors' pages between passes
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
    const long before = memory("VmRSS:");
    c10::InferenceMode inference;
    auto [model, about] = load(argv[1]);
    const auto classes = split(about["classes"]), palette = split(about["palette"]);
    if (classes.empty()) throw std::runtime_error(std::string(argv[1]) + " is no model that export.py made");
    const int channels = split(about["mean"]).size(), stride = std::stoi(about["stride"]);
    if ((channels != 1 && channels != 3) || stride < 1 || stride > 64)
        throw std::runtime_error(std::string(argv[1]) + " has a damaged description");
    int first = 2;
    fs::path out = "predictions";
    if (std::string(argv[2]) == "--bench") {
        if (argc != 7) throw std::runtime_error("--bench wants BATCH SIZE SECONDS THREADS");
        bench(model, channels, argv + 3, before);
        return 0;
    }
    if (std::string(argv[2]) == "--out" && argc > 4) out = argv[3], first = 4;
    if (about["data"].find("SYNTHETIC") != std::string::npos)
        std::cerr << "NOTE: " << argv[1] << " was trained on " << about["data"] << "\n";
    std::set<fs::path> written;
    for (int i = first; i < argc; i++) {
        Tensor image;
        try {
            image = read_image(argv[i], channels).permute({2, 0, 1}).unsqueeze(0);
        } catch (const std::runtime_error& error) {
            throw std::runtime_error(std::string(argv[i]) + ": " + error.what());
        }
        const int64_t height = image.size(2), width = image.size(3);
        // the network halves the image: repeat its edge up to the next size that it can
        auto rows = torch::arange((height + stride - 1) / stride * stride).clamp_max(height - 1);
        auto columns = torch::arange((width + stride - 1) / stride * stride).clamp_max(width - 1);
        const Tensor logits = model(image.index_select(2, rows).index_select(3, columns).contiguous())[0];
        if (palette.empty()) {
            const auto [odds, best] = logits.softmax(0).max(0);
            std::printf("%s: %s %.1f %%\n", argv[i], classes.at(best.item<int64_t>()).c_str(), 100 * odds.item<float>());
            continue;
        }
        const fs::path path = out / fs::path(argv[i]).stem().concat(".png");
        if (!written.insert(path).second) throw std::runtime_error("two images would both write " + path.string());
        fs::create_directories(out);
        write_mask(logits.argmax(0).to(torch::kUInt8).slice(0, 0, height).slice(1, 0, width), palette, path);
        std::printf("%s -> %s\n", argv[i], path.c_str());
    }
    return 0;
}

int main(int argc, char** argv) {
    try {
        return run(argc, argv);
    } catch (const std::exception& error) {  // torch appends a stack trace: the first line says what is wrong
        std::string message = error.what();
        std::cerr << "error: " << message.substr(0, message.find('\n')) << "\n";
        return 2;
    }
}
